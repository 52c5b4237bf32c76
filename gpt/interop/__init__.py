"""Models from elsewhere on disk to models in memory."""
