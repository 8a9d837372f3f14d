"""A matrix rounded with less loss than to the nearest: scales searched, errors fed back, steps descended."""
