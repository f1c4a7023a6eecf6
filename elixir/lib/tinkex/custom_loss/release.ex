defmodule Tinkex.CustomLoss.Release do
  @moduledoc """
  A step of `mix release` that puts the Python environment into the release.

      releases: [
        trainer: [
          steps: [:assemble, &Tinkex.CustomLoss.Release.python/1, :tar],
          custom_loss: [torch: :cpu]
        ]
      ]

  The environment is `python` in the root of the release, where the pools of the release find it
  untold, and goes into its tar file. `:custom_loss` are options of `Tinkex.CustomLoss.setup!/1`.

  A Python environment is a link to the Python that it was made with, and packages. So the machine
  that runs the release needs that Python at the same path, as images with the same base have it, and
  the same operating system and architecture.
  """

  @doc "The step, to be named after `:assemble` and before `:tar`."
  @spec python(release) :: release
        when release: %{
               required(:path) => Path.t(),
               required(:overlays) => [String.t()],
               required(:options) => keyword(),
               optional(atom()) => term()
             }
  def python(%{path: path, overlays: overlays, options: options} = release) do
    opts = Keyword.get(options, :custom_loss, [])
    Tinkex.CustomLoss.setup!([dir: Path.join(path, "python")] ++ opts)
    %{release | overlays: Enum.uniq(["python" | overlays])}
  end
end
