"""A dataset looked at before it is trained on: checks, filters, descriptions, pages."""
