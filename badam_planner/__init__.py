"""Plans block-coordinate fine-tuning: which partition fits which card, at which peak and speed."""
