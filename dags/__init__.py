"""Airflow's side of the project: what runs when. What a step does stands in tasks/ and knows nothing of Airflow."""
