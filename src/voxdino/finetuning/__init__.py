"""Fine-tune a segmenter on a prepared data set: settings, recipes, the run."""
