"""What is measured on: the arms, their items and answers, and how given answers are read."""
