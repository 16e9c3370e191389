"""STAR as a PEFT tuner."""
