# Kino cannot be fetched where these tests must run. This stands in for what Tinkex.CustomLoss calls.
unless Code.ensure_loaded?(Kino.Render) do
  defprotocol Kino.Render do
    @moduledoc false
    def to_livebook(value)
  end

  defmodule Kino.Markdown do
    @moduledoc false
    defstruct [:text]
    def new(text), do: %__MODULE__{text: text}
  end

  defimpl Kino.Render, for: Kino.Markdown do
    def to_livebook(%{text: text}), do: %{type: :markdown, text: text}
  end
end
