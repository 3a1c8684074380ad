"""Load trained classifiers, predict with them and measure their accuracy."""
