"""The review queue: a sample of the scored images, written to a folder for a person to label."""
