"""Image to video from any checkpoint, and the pictures that show the result."""
