"""From a trained model and images to label maps on the images' own grids."""
