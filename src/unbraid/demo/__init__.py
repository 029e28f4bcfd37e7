"""A small trained network and a sample of Fashion-MNIST that come with the package."""
