"""A patch as files: read, checked and written, as a plain LoRA, with its card, on the Hub."""
