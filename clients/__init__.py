"""What runs where the data are: the local training loop and Flower's ClientApp around it."""
