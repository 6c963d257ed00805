"""Generation: text from a trained model, and prompts' states on disk."""
