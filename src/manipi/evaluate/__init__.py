"""What a trained policy is worth: open loop, closed loop, replays, latency, and the report of the demo."""
