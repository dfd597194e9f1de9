"""Files and folders in the stores of others."""
