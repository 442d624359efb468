"""The mathematics: EDM scalings and loss, everything random of a step, and what the UNet is told. Networks are passed in."""
