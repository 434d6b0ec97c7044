"""Any Hugging Face causal language model, taken apart and called: no trainer, no loss."""
