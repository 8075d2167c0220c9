"""What stages without steps can fit: classifiers, feature maps, closed forms."""
