"""Programs for maintainers: builds and checks of a release. Run from the checkout, never installed."""
