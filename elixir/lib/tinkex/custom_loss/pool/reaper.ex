defmodule Tinkex.CustomLoss.Pool.Reaper do
  @moduledoc false
  # Ends the process groups of workers, with all their children, whatever they do.
  #
  # A closed port is only an end of file to Python, and code that holds its interpreter's lock never
  # looks. Workers are therefore killed from outside, by a shell of the pool's. It outlives the pool by
  # the moment that it takes to see that its input ends, and then kills all that are left: also when
  # the pool was killed, and when the emulator halts, which it would not do while a worker leaves
  # unread what was sent to it.

  # The kill of the shell, because a container need not have the program. A negative number is that
  # of a process group: the worker and what it started, also after the worker itself is gone. There
  # is nothing to say about a group that does not exist any more.
  @shell """
  exec 2>/dev/null
  groups=' '
  while read -r what group; do
    case $what in
      watch) groups="$groups$group " ;;
      kill) kill -KILL "-$group"; groups="${groups%% $group *} ${groups#* $group }" ;;
    esac
  done
  for group in $groups; do kill -KILL "-$group"; done
  """

  @doc "Starts the shell; the calling process owns it, and with it ends whatever is watched."
  @spec open() :: port()
  def open do
    options = [:binary, :hide, args: ["-c", @shell]]
    Port.open({:spawn_executable, "/bin/sh"}, options)
  end

  @doc "Ends the process group `os_pid` with the owner of the shell."
  def watch(reaper, os_pid), do: tell(reaper, "watch #{os_pid}\n")

  @doc "Ends the process group `os_pid`, which is watched, now."
  def kill(reaper, os_pid), do: tell(reaper, "kill #{os_pid}\n")

  # Whoever ended the shell is heard of by its owner.
  defp tell(reaper, line) do
    Port.command(reaper, line)
  rescue
    ArgumentError -> true
  end
end
