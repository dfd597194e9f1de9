"""The simulated arm: environment, demonstrations, demo and recipes."""
