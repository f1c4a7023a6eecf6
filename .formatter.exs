[
  inputs: [
    "{mix,.formatter}.exs",
    "elixir/**/*.{ex,exs}",
    "tests/**/*.{ex,exs}",
    "{docs,scripts}/**/*.exs"
  ]
]
