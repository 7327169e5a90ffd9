"""Operations with a plain-torch reference twin. Imports nothing else of the package."""
