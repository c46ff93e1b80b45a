"""The bank of LoRA slots over one frozen base; PEFT files in and out."""
