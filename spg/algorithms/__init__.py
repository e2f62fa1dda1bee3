"""The mathematics: advantages, masks, likelihood estimators and objectives."""
