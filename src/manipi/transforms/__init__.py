"""From a robot's numbers to the model's, every step with both directions; numpy only."""
