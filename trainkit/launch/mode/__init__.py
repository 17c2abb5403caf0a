"""What `mode=` chooses beside train and eval: for each a module, and in it a function, of its name; and their parts."""
