"""Speed and memory: one module per question, `python -m trainkit.bench NAME`; a bench has a `main(args)`."""
