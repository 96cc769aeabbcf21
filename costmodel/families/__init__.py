"""Model families: what a Hugging Face config says, and what is made of it."""
