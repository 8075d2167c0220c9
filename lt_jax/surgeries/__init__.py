"""What stages of no steps fit: classifiers, maps of features, closed forms."""
