"""What makes hqq work inside other libraries: one package per library, imported only when that library is."""
