"""`shodh bench forecast`: our model and other networks, trained for the same time, forecast the same flows."""
