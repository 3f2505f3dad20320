"""Turn the arguments of a public function into a `Call`: check, cast and flatten them."""
