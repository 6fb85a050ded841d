"""One training step measured: against the physical floor, full fine-tuning, a linear probe and PEFT."""
