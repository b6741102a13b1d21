"""What there is besides plain LoRA: variants, several adapters at once, whole layers, peft's files, the monitor."""
