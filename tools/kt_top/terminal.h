// The terminal of the live screen: alternate screen, no echo, restored on every way out.
#pragma once
#include <termios.h>

#include <string>
#include <vector>

namespace kt::top {

struct TerminalSize {
  int columns = 80;
  int rows = 24;
};

class Terminal {
 public:
  Terminal();  // Enters the alternate screen. Standard output must be a terminal.
  ~Terminal();
  Terminal(const Terminal&) = delete;
  Terminal& operator=(const Terminal&) = delete;

  TerminalSize size() const;
  void draw(const std::vector<std::string>& lines) const;

 private:
  termios saved_{};
  bool input_is_terminal_ = false;
};

}  // namespace kt::top
