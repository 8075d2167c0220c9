"""What stages without steps fit: classifiers, maps of features, closed forms."""
