"""Loading, the LoRA block, chat templates, where a base comes from."""
