"""Images and videos on their way through a training batch."""
