"""From the keyword arguments of a public function to a `Call`: checked, cast, shifted, flattened."""
