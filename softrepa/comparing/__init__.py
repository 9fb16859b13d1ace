"""Ways to draw the same prompts, beside each other: pictures on disk, their scores, what they say."""
