"""What several benchmark scripts share."""
