"""Operations on arrays, each with a table of implementations."""
