"""manipi: the π-family of robot policies in one PyTorch codebase. What trains is what deploys."""

__version__ = "0.1.0"
