"""LeRobot v2.0, v2.1 and v3.0: read, and v3.0 written."""
