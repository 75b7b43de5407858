"""What needs the model's behaviour on data."""
