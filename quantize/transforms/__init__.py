"""Changes of a full-precision model that leave its function as it is but may make it easier to round."""
