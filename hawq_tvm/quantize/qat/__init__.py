"""Fine-tuning in the deployed arithmetic."""
