"""GPT-2 and Llama in the Hugging Face layout: read, and written."""
