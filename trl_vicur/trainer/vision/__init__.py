"""Images and videos in training: processing them, sharing their features, and blank images for text-only ranks."""
