"""From a data set as published to cases ready for training: check, fingerprint, plan, splits, prepare. No torch."""
